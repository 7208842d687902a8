"""Measures what a bundle and a capacity policy can hold: traces, a simulator on a virtual clock, reports, bounds.

trace | arrivals -> simulator (the gateway's own scheduler) -> outcomes -> report
                 -> oracle (what no policy can exceed)      ------------> report

Torch-free. Of `exporter` and `server` it uses the manifest and the decisions; no HTTP, no runtime.
"""
