"""The ground floor: what a pair is, and how pairs lie on disk.

Everything above (`cluster`, `filters`, `training`, `pipelines`) imports from here; nothing here
imports from above, from Ray or from Prefect.
"""

__version__ = "0.1.0"
# Of a workspace on disk; one of another version is refused, never guessed at. 2: pairs have the column `colour`.
FORMAT_VERSION = 2
