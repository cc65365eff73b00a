"""Several runs or evaluations side by side: trained, ranked where their numbers mean the same, drawn on one page."""
