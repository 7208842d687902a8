"""Batches run on Triton servers. Decisions stand in modules without I/O and clock, waiting in the others.

window, breaker, endpoint, failure, contract    how many batches at once, whether any, where, again, which model
address, tensors                                what a URL says, batches to tensors and back
wire, grpc_client, http_client, connect         the two protocols
shared_memory                                   a way around it on one host
link, backend                                   one server with its probes, all as one backend
"""
