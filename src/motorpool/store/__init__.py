"""What must survive: the books in SQLite, and files in a folder.

``database`` opens and migrates; ``customer`` holds keys, files and batches as the API shows them; ``books`` holds what
the scheduler commits: leases, checkpoints, results, transfers; ``blobs`` keeps the bytes of files.
"""
