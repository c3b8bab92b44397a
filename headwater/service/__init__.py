"""The service: runs, their data and jobs over HTTP, and a page to look at them. Needs the extra headwater[serve]."""
