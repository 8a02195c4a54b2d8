"""Enters: folders of runs, or commands that make them.
Leaves: pages, tables and pictures for people, JSON for programs.
Next: nothing; tools stand beside the path of the data, and no part of mpl needs them.
"""
