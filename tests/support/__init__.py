"""Shared by several tests: small random models of every family, and running plans over sequences. Downloads nothing."""
