"""Colored memory: which frames a tenant's colors have, how its addresses are translated to them, and the pool of pages."""
