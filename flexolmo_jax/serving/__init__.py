"""`flexolmo serve`: a merged model over OpenAI's interface, with experts chosen per request."""
