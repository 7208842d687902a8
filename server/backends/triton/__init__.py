"""Batches run on Triton servers. Decisions stand in modules without I/O and clock, waiting in three others.

window, breaker, endpoint, failure, contract    how many batches at once, whether any, where, again, which model
grpc_client, link, backend                      the wire, one server with its probes, all as one backend
"""
