"""Hostile peers: a control client, an NBD server. What they send changes nothing."""
