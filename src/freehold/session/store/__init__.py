"""What a server keeps: responses, conversations and API keys, in one database."""
