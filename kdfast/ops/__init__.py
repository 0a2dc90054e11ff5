"""One file per operation: argument checks, autograd, operator schema, and the way to a backend."""
