"""What is measured, and with what: clocks, memory, the machine, errors, and the file that rows go to."""
