"""The policy behind OpenAI's API, for agents that are not LangGraph (docs/endpoint.md)."""
