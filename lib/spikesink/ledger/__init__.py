"""What is said of measures: evidence, the rules that judge it, ledgers, and the table of all of them."""
