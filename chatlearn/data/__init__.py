"""Dataset files to tasks (``prompt_dataset``), and who has which prompt (``prompt_stream``)."""
