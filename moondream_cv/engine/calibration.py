class Calibration:
    def apply(self, skill, score):
        return score
