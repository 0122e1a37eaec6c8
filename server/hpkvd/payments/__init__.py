"""Ways to pay: each makes something that an IssueRequest redeems once for credentials."""
