"""What several recipes share: arguments, training and evaluation through TRL, SmolLM2, tables and figures."""
