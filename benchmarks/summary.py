"""The table that ends `make bench`: every claim with its measured value, its goal, and whether it holds."""

import json
import sys

from rich.console import Console
from rich.table import Table

from report import RESULTS

table = Table(box=None, header_style="bold", pad_edge=False)
for column in ("claim", "value", "goal", "holds"):
    table.add_column(column)
results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
for each in results:
    table.add_row(
        each["claim"], f"{each['value']:.3g} {each['unit']}", f"{each['goal']:g}", "yes" if each["holds"] else "NO"
    )
Console().print(table)
sys.exit(not all(each["holds"] for each in results))
