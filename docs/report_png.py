"""Takes pictures of a report: python docs/report_png.py RUN/report.html docs/report.png [FRAGMENT [WIDTH HEIGHT]]

FRAGMENT is the link within the page, e.g. '#experience'. Needs playwright and an installed Chromium.
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

report, picture, fragment, width, height = [*sys.argv[1:], *["", "1440", "900"][len(sys.argv) - 3 :]]
with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
    page = browser.new_page(viewport={"width": int(width), "height": int(height)}, color_scheme="light")
    page.goto(Path(report).resolve().as_uri() + fragment)
    page.locator("#loading").wait_for(state="detached")
    page.wait_for_timeout(500)  # charts are drawn when they come into view
    page.screenshot(path=picture)
    browser.close()
