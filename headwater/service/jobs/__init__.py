"""Jobs of the server: their requests, the queue, and the processes that run them."""
