"""What the chat model is made of: tools, keywords of a call, chunks, structured output."""
