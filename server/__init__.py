"""The gateway: HTTP requests with images in, classifications out, in time and as accurate as the load allows.

    routes -> query (what a request allows) -> upload -> gateway (check -> decode -> engine) -> answer
    engine <-> scheduler (admission, queue; a policy picks batch and operating points)
    engine <-> backend
    workers: several of all this behind one port

Scheduler and policies do no I/O and have no clock: the simulator drives the same objects.
"""
