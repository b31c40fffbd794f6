"""What the scripts of papers and tools do with a completion, written anew: their errors are kept on purpose.

Each module names its source and version; eval/NOTICE names their licences. A slow test compares the verdicts with the
packages themselves, where there are packages.
"""
