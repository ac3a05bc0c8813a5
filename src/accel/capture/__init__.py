"""Recording: watches one real run of a root and writes down what it did."""
