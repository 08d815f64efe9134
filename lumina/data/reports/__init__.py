"""What data are like, before and after preparation; tokenizers beside each other."""
