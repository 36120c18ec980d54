"""Takes a picture of a report: python docs/report_png.py REPORT PICTURE [FRAGMENT [WIDTH HEIGHT [SELECTOR ...]]]

FRAGMENT is the link within the page, e.g. '#experience', WIDTH and HEIGHT the window's; what SELECTORs name is clicked
first. Needs playwright and an installed Chromium.
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

report, picture, *rest = sys.argv[1:]
fragment, width, height = [*rest[:3], *["", "1280", "830"][len(rest) :]]
with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
    page = browser.new_page(viewport={"width": int(width), "height": int(height)}, color_scheme="light")
    page.goto(Path(report).resolve().as_uri() + fragment)
    page.locator("#loading").wait_for(state="detached")
    for selector in rest[3:]:
        page.locator(selector).click()
    page.wait_for_timeout(500)  # charts are drawn when they come into view
    page.screenshot(path=picture)
    browser.close()
