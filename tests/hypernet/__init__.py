"""Tests of the library `hypernet`."""
