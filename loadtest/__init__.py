"""Measures what a bundle and a capacity policy can hold: traces, live load, a simulator on a virtual clock, reports.

trace | arrivals -> simulator (the gateway's own scheduler) -> outcomes -> report
                 -> generator (over HTTP to a gateway) -> recorder -> outcomes -> report
                 -> oracle (what no policy can exceed)      ------------> report

Torch-free. Of `exporter` and `server` it uses the manifest, the decisions and the bodies of answers; HTTP is known to
`client` alone. Needs the extra `loadtest`.
"""
