"""Tables, plots and pages from rows."""
