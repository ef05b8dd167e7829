"""`stars bench serve`: an endpoint of OpenAI's API under load, as its clients see it."""
