"""What ``vdcore bench SUITE`` runs: a module per suite."""
