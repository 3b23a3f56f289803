"""The forward process: which tokens are hidden or spoilt, shared by training and likelihood."""
