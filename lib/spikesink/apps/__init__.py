"""What is run: the notebooks, the report, scans, pages and the bench. Nothing else of the library imports from here."""
