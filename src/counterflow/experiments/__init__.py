"""What a run is: rollouts, evaluation, statistics, figures and films."""
