"""Chat templates: rendered, played through, checked against what the prompt builder appends."""
