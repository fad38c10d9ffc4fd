"""Measurements that carry their method."""
