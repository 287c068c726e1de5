"""The operators, one file a family: checks, choice of backend, fake and autograd registration."""
