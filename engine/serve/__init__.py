"""What servers are made of: an engine behind asyncio."""
