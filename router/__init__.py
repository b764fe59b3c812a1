"""From a chat request and the centroids of a tenant's adapters to the adapter that answers, or to none.

A library: no Ray, no HTTP, no vLLM, no database. `embed` makes vectors, `centroids` condenses a document into a few of
them, `query` picks the text of a request to compare, `scoring` weighs shared words, `index` searches one tenant's
documents and their parts, `decide` chooses.
"""
