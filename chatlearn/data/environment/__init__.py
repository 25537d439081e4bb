"""Environments behind HTTP: ``client`` for agents and readers, ``server`` for any Python class."""
