"""The HTTP API: OpenAI's endpoints, and documents, jobs, adapters and routing beside them."""
