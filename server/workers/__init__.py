"""Several gateways behind one port: a parent that serves nothing, and workers that know nothing of one another.

supervisor --starts, stops, replaces--> worker (the gateway of `server.app`, whole)
supervisor <--pipe: `messages`--> `link` of a worker
worker --`registry`: its series in files--> /metrics of any worker
"""
