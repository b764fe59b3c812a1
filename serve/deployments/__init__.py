"""The Ray Serve deployments: ingress, generator, engine, router."""
