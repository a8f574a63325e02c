"""The demo web: a small web of drawn scenes with known defects, its ground truth, and the server that shows it.

`web.make_web` writes it, `server.serve` serves it. Nothing here imports a filter, so that what measures the web
can't share a word list with what made it.
"""
