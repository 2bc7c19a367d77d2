"""Contact sheets show every picture in its place."""

import numpy as np
from PIL import Image

from run.pictures import contact_sheet


def test_contact_sheet_places_every_picture():
    red, blue = Image.new("RGB", (10, 30), "red"), Image.new("L", (500, 500), 90)
    sheet = np.asarray(
        contact_sheet([[red, blue], [None, red], [blue]], ["a", "b"], ["x", "y"], cell=(40, 80))
    )
    bare = np.asarray(contact_sheet([[red, blue], [None, red], [blue]], cell=(40, 80)))
    assert bare.shape == (4 + 3 * 44, 4 + 2 * 84, 3)
    cells = [[bare[4 + i * 44 : 44 + i * 44, 4 + j * 84 : 84 + j * 84] for j in range(2)] for i in range(3)]
    assert cells[0][0][20, 40].tolist() == [255, 0, 0] and cells[0][0][20, 2].tolist() == [128, 128, 128]
    assert cells[0][1][20, 40].tolist() == [90, 90, 90]
    assert (cells[1][0] == 255).all() and (cells[2][1] == 255).all()
    assert cells[1][1][20, 40].tolist() == [255, 0, 0]
    assert sheet.shape[0] > bare.shape[0] and sheet.shape[1] > bare.shape[1] and (sheet < 60).all(-1).any()
    assert contact_sheet([[red]], ["word " * 99], ["word " * 99]).size[1] < 500
