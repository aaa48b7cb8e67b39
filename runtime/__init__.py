"""Infrastructure of a run: files, stages, worker processes, downloads, reports and figures."""
