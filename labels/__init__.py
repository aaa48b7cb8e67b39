"""Which labels of a preference file to distrust: voters, and the page for a person's decision.

    heads     linear reward heads on fixed features, and their votes out of fold
    review    writes the page, report.html, and reads the decisions that it saves
"""
