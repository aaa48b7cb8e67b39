"""Which labels of a preference file to distrust: the page on which a person reviews the suspects.

    review    writes the page, report.html, and reads the decisions that it saves
"""
