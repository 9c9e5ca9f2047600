"""Reports on studies and runs: tables, plots, Markdown, LaTeX, CSV, JSON and one HTML page."""
