"""The report of a run: `report.json` (everything that it says) and `report.html` (the same, to look at)."""
