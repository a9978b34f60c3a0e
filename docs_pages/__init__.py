"""Scripts that write the parts of docs/ which follow from the code: `python -m docs_pages`."""
